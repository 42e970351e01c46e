"""The course: blanks in the chapters, their texts, graders and wrong answers."""
