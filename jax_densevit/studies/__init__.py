"""A study: several models on the same data under the same terms, one report."""
