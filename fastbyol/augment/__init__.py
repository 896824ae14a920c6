"""What each view draws (`parameters`), and three executors of one parameter array: reference, CPU kernel, device graph."""
