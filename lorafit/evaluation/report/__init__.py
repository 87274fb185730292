"""What an evaluation found, for people and for CI."""
