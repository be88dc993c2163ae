"""The entropy-guided, softmax-only transformer as pure mathematics: no module here knows of ranks or process groups."""
