"""Functions of arrays, without trees and without optax."""
