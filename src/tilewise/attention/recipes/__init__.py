"""Recipes: named methods with a paper's defaults, a file each."""
