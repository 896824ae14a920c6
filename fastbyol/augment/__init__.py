"""The random augmentation: parameters of each view (`parameters`) and three executors of them (reference, CPU kernel, device graph)."""
