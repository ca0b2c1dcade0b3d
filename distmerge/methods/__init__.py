"""The mathematics: pure functions on tensors that know no files, devices or ranks."""
