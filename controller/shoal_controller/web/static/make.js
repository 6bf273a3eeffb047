// An element with properties.
export const make = (tag, properties) => Object.assign(document.createElement(tag), properties);
