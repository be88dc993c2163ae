"""The training state under global names: what a rank holds of each tensor, whatever the layout."""
