"""How many units each layer keeps: always the exact budget, never an empty layer, never a protected one."""
