"""From a cache to batches: order, held-out documents, packing, decoding on the device."""
