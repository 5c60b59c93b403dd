"""Ways to keep a weight, each with the product that reads it: one file for each."""
