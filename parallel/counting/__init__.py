"""Memory and traffic of a layout: predicted from formulas, and counted while it runs."""
