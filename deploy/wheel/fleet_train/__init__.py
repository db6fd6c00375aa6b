"""The programs of fleet, in the folder `bin`: they train neural networks, and need no Python for it."""
