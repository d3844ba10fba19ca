"""nanomed: a from-scratch, minimal training library for the Aquila-Med recipe."""
