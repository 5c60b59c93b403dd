"""What can serve a layer: one backend for each way to keep a weight, and the choice among them."""
