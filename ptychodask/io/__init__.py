"""Foreign formats: one file each behind a table; renaming, flips, cropping, binning and units end here."""
