"""What the product costs, measured: scripts, and what tests share with them."""
