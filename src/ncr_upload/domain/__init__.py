"""Pure decisions: no clock, disk, network or log. Everything here takes values and returns values."""
