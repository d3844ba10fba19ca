"""The loop: one step of it, the optimizer, the losses, and what happens when a step goes wrong."""
