"""Sources write WebDataset tars, an index makes samples addressable, a sampler orders them, a loader yields them."""
