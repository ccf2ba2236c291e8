"""What is done about the units that go: refits of the output projections."""
