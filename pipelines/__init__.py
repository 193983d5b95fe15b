"""What runs, when and where: the catalog, the code location, jobs, and the `levanter` command."""
