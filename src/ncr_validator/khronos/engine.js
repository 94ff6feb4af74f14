// Runs the Khronos glTF validator: one JSON line in (a path), one JSON line out (its report).
//
//   {"path", "root", "format": "glb"|"gltf", "max_issues"}  ->  {"report", "external": {uri: path}} | {"rejected"}
//   {"hello": true}                                          ->  {"version"}
//
// External files are confined to `root`, links followed. A failed allocation ends the process: its parent then knows why.
"use strict";
const fs = require("fs");
const path = require("path");
const validator = require(path.join(process.argv[2], "node_modules", "gltf-validator"));

function resolveInside(root, folder, uri) {
  if (/^[a-z][a-z0-9+.-]*:/i.test(uri) || /^[\\/]/.test(uri)) throw new Error("not a relative path");
  const name = decodeURIComponent(uri);
  if (name.includes("\0") || name.includes("\\") || /^[a-z]:/i.test(name) || path.isAbsolute(name)) {
    throw new Error("not a relative path");
  }
  const base = fs.realpathSync(root);
  const target = path.resolve(folder, name);
  const inside = (file) => file.startsWith(base + path.sep);
  if (!inside(target)) throw new Error("leads out of the package");
  const real = fs.realpathSync(target);
  if (!inside(real)) throw new Error("leads out of the package");
  if (!fs.statSync(real).isFile()) throw new Error("not a file");
  return real;
}

// Always an array at the start of its own buffer: the engine misreads a view into Node's shared pool of small buffers.
function readBytes(file) {
  const handle = fs.openSync(file, "r");
  try {
    const bytes = new Uint8Array(fs.fstatSync(handle).size);
    for (let at = 0; at < bytes.length; ) {
      const count = fs.readSync(handle, bytes, at, Math.min(bytes.length - at, 1 << 26), at);
      if (count === 0) throw new Error("the file ended early");
      at += count;
    }
    return bytes;
  } finally {
    fs.closeSync(handle);
  }
}

function isMemory(error) {
  return error instanceof RangeError && /allocation failed|invalid array (buffer )?length/i.test(String(error.message));
}

function dieOfMemory(error) {
  fs.writeSync(2, "allocation failed: " + String(error && error.message) + "\n");
  process.exit(70);
}

async function judge(question) {
  const external = {};
  const folder = path.dirname(fs.realpathSync(question.path));
  const options = {
    uri: path.basename(question.path),
    format: question.format,
    maxIssues: question.max_issues,
    writeTimestamp: false,
    externalResourceFunction: async (uri) => {
      try {
        const file = resolveInside(question.root, folder, uri);
        external[uri] = file;
        return readBytes(file);
      } catch (error) {
        if (isMemory(error)) dieOfMemory(error);
        throw new Error(error.code === "ENOENT" ? "not in the package" : error.code || error.message);
      }
    },
  };
  try {
    return { report: await validator.validateBytes(readBytes(question.path), options), external };
  } catch (error) {
    if (isMemory(error)) dieOfMemory(error);
    return { rejected: String(error && error.message ? error.message : error).slice(0, 500) };
  }
}

async function answer(line) {
  const question = JSON.parse(line);
  const reply = question.hello ? { version: validator.version() } : await judge(question);
  const bytes = Buffer.from(JSON.stringify(reply) + "\n");
  for (let at = 0; at < bytes.length; ) at += fs.writeSync(1, bytes, at);
}

let pending = "";
let queue = Promise.resolve();
process.stdin.setEncoding("utf8");
process.stdin.on("data", (chunk) => {
  pending += chunk;
  for (let end = pending.indexOf("\n"); end >= 0; end = pending.indexOf("\n")) {
    const line = pending.slice(0, end);
    pending = pending.slice(end + 1);
    queue = queue.then(() => answer(line));
  }
});
process.stdin.on("end", () => process.exit(0));
