"""Angular-KD: diverse views of one teacher (``views.py``) and the student that distils them (``student.py``)."""
