"""What stands beside the weights in a folder that a conversion writes."""
