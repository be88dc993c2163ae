"""Training state under global parameter names, independent of the layout that holds it."""
