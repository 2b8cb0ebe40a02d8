"""The optimizer: its state, its step, its state_dict."""
