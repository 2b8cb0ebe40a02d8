"""From a name in a config to an optimizer in a LightningModule."""
