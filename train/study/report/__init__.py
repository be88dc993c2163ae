"""Reports of a study: tables, statistics and pictures of its results, as Markdown and as HTML."""
