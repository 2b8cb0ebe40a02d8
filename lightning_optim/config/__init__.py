"""From a word in a config to an optimizer in a LightningModule."""
