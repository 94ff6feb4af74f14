"""One module per port and vendor library; each has one table from the vendor's errors to ours."""
