"""What every other package may use: text from outside, JSON from outside. Standard library only."""
