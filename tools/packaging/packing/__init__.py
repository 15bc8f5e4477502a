"""What a build of the package makes from the sources: manual pages, completion, the SBOM."""
