"""The complete miniature task: scenes of handwritten digits, questions, data set, benchmark."""
