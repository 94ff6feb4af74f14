"""The whole stack on one machine: what `ncr dev` and `ncr demo` run."""
