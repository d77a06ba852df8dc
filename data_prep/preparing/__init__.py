"""From raw images to verified files: cleaned, written in order by processes, compared."""
