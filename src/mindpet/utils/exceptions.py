"""The errors that the user document names."""


class MindPetError(Exception):
    """Base of the errors below."""


class LinkPathError(MindPetError, ValueError):
    """A path is a symbolic link, which is refused."""


class AbsolutePathError(MindPetError, ValueError):
    """A path is not absolute."""


class ReadYamlFileError(MindPetError, ValueError):
    """A YAML file is missing, a symbolic link, unreadable, or not YAML."""


class ModelConfigFreezeInfoError(MindPetError, ValueError):
    """A freeze file has no usable ``freeze`` entry."""
