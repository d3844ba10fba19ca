"""The decoder, what its backward computes again, and text from it."""
