"""The whole system on one machine, on real parts: for `ncr dev`, `ncr demo` and the tests. Not for production."""
