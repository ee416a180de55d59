"""The namespace of the torch operators: the name of the top-level package that holds this folder.

It is "fastdistill" in fastdistill. A copy of the folder in another package registers its operators
under the name of that package, so that several copies work in one process.
"""

NAMESPACE = __name__.partition(".")[0]
