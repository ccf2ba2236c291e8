"""Keep a function, or forget it: conditions, the neurons to cut, the repair that does not bring it back."""
