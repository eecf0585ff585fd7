"""What is learned: loss, decoding, metrics and picture sheet, one file per task."""
