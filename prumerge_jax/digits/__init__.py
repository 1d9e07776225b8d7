"""The miniature task, whole: scenes of handwritten digits, questions, data set, benchmark."""
