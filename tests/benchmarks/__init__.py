"""What is measured and not asserted: accuracies, times and memory, each run by a command."""
