// Pictures on the page: which URLs are shown at all, how they look, and how a file becomes one that can be sent.

const MAX_SIDE = 1024, MAX_BYTES = 2 ** 20, KINDS = ["image/png", "image/jpeg", "image/webp", "image/gif"];

export const MAX_PICTURES = 16; // the server's own limit for one request, unless its operator sets another

// Data and nothing else: no URL that comes from a server or a model ever makes the browser fetch something.
export const isPicture = (url) => typeof url === "string" && /^data:image\/(png|jpeg|webp|gif);base64,/.test(url);

export function picture(url, alt) {
  const image = document.createElement("img");
  if (isPicture(url)) image.src = url;
  image.alt = alt;
  return image;
}

// One that a model drew. number: of its place in the answer, from 1.
export function drawing(url, alt, number) {
  const figure = document.createElement("figure");
  const link = document.createElement("a");
  link.href = url;
  link.download = `braid-${number}.${url.slice("data:image/".length, url.indexOf(";"))}`;
  link.textContent = "Download";
  link.ariaLabel = `Download picture ${number}`;
  figure.className = "drawing";
  figure.append(picture(url, alt), link);
  return figure;
}

// A file's data URL: of the file as it is, or drawn anew where it is large or of a kind that browsers alone read.
// Rejects what is no picture.
export async function urlOf(file) {
  const bitmap = await createImageBitmap(file);
  try {
    const scale = Math.min(1, MAX_SIDE / Math.max(bitmap.width, bitmap.height));
    if (scale === 1 && file.size <= MAX_BYTES && KINDS.includes(file.type)) return await read(file);
    const canvas = document.createElement("canvas");
    canvas.width = Math.max(1, Math.round(bitmap.width * scale));
    canvas.height = Math.max(1, Math.round(bitmap.height * scale));
    const pen = canvas.getContext("2d");
    pen.fillStyle = "#fff"; // JPEG has no transparency
    pen.fillRect(0, 0, canvas.width, canvas.height);
    pen.imageSmoothingQuality = "high";
    pen.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
    return canvas.toDataURL("image/jpeg", 0.9);
  } finally {
    bitmap.close();
  }
}

const read = (file) => new Promise((resolve, reject) => {
  const reader = new FileReader();
  reader.addEventListener("load", () => resolve(reader.result));
  reader.addEventListener("error", () => reject(reader.error));
  reader.readAsDataURL(file);
});
