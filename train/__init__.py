"""The application: configuration, the training loop, evaluation, pictures."""
