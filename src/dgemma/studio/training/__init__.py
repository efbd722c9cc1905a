"""Training without code: recipes from a form, runs as processes of their own, films of what they learn."""
