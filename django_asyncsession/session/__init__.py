"""What a user holds in the hand: one unit of work on one database."""
