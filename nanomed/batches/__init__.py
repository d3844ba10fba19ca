"""Examples into rows: the order, the mixture of sources, packing, and who gets which row."""
