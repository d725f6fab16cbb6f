"""The table of methods, and one small file for each method that is more than a recipe."""
