"""What edits need beside generations: a body with image files in it, none of which is trusted.

A multipart body of OpenAI's images API enters, a checked request leaves. In reading order:

upload.py        the body: fields and files, within limits of size, time and number
image_file.py    a file's bytes -> pixels; nothing is decoded before its header was believed
edit_request.py  fields and files, checked: what enters the queue
"""
