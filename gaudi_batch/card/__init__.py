"""The process that holds a card."""
