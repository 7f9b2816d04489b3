/**
 * Picture files to `Picture`: PNG by this reader (in Node, too), JPEG, WebP, GIF and BMP by the browser.
 *
 * In: bytes, and the most pixels that are decoded. Out: a `Picture` with its orientation. Not here: operations.
 */
import { PocketError } from './errors.js';
import { isJpeg, isWebp, orientation } from './orientation.js';
import { Picture } from './picture.js';
import { decodePng, isPng, pngSize } from './png.js';

const ascii = (bytes, place, length) => String.fromCharCode(...bytes.subarray(place, place + length));
const damaged = () => new PocketError('image: is truncated or damaged; save it again');

/** Start-of-frame markers: those from C0 to CF but for the three that are none. */
const isFrame = (marker) => marker >= 0xc0 && marker <= 0xcf && ![0xc4, 0xc8, 0xcc].includes(marker);

function jpegSize(bytes, view) {
  for (let place = 2; place + 9 <= bytes.length; ) {
    if (bytes[place] !== 0xff) throw damaged();
    const marker = bytes[place + 1];
    if (isFrame(marker)) return { height: view.getUint16(place + 5), width: view.getUint16(place + 7) };
    place += marker === 0xff ? 1 : 2 + view.getUint16(place + 2);
  }
  throw damaged();
}

function webpSize(bytes, view) {
  const three = (place) => view.getUint16(place, true) | (bytes[place + 2] << 16);
  switch (ascii(bytes, 12, 4)) {
    case 'VP8X':
      return { width: three(24) + 1, height: three(27) + 1 };
    case 'VP8L': {
      const packed = view.getUint32(21, true);
      return { width: (packed & 0x3fff) + 1, height: ((packed >>> 14) & 0x3fff) + 1 };
    }
    default:
      return { width: view.getUint16(26, true) & 0x3fff, height: view.getUint16(28, true) & 0x3fff };
  }
}

/** Width and height by the file's head. */
function sizeOf(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  try {
    if (isPng(bytes)) return pngSize(bytes);
    if (isJpeg(bytes)) return jpegSize(bytes, view);
    if (isWebp(bytes)) return webpSize(bytes, view);
    if (ascii(bytes, 0, 4) === 'GIF8') return { width: view.getUint16(6, true), height: view.getUint16(8, true) };
    if (ascii(bytes, 0, 2) === 'BM') {
      return { width: Math.abs(view.getInt32(18, true)), height: Math.abs(view.getInt32(22, true)) };
    }
  } catch (error) {
    throw error instanceof PocketError ? error : damaged();
  }
  throw new PocketError('image: is no PNG, JPEG, WebP, GIF or BMP file; save it as one of these');
}

/** `most`: pixels of the largest picture that is decoded. */
export async function readPicture(bytes, most) {
  const { width, height } = sizeOf(bytes);
  if (!width || !height) throw damaged();
  if (width * height > most) {
    throw new PocketError(
      `image: ${width} x ${height} is ${width * height} pixels, the limit is ${most}; make it smaller`,
    );
  }
  const turned = orientation(bytes);
  const decoded = isPng(bytes) ? await decodePng(bytes) : await decodeByBrowser(bytes, turned);
  return new Picture({ ...decoded, orientation: turned?.value ?? 1, isFile: true });
}

/** Samples as they are stored: the orientation is taken out first, whatever the browser would do with it. */
async function decodeByBrowser(bytes, turned) {
  if (typeof createImageBitmap !== 'function') {
    throw new PocketError('image: only PNG files are decoded outside of a browser; convert it');
  }
  const plain = Uint8Array.from(bytes);
  if (turned) plain[turned.at] = 1;
  let bitmap;
  try {
    bitmap = await createImageBitmap(new Blob([plain]), { premultiplyAlpha: 'none', colorSpaceConversion: 'none' });
  } catch {
    throw damaged();
  }
  const { width, height } = bitmap;
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext('2d', { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  let { data } = context.getImageData(0, 0, width, height);
  let isOpaque = true;
  for (let place = 3; place < data.length && isOpaque; place += 4) isOpaque = data[place] === 255;
  if (!isOpaque) data = readWithAlpha(bitmap);
  bitmap.close();
  return { width, height, channels: 4, samples: new Uint8Array(data.buffer) };
}

/** A 2D canvas multiplies alpha in, a texture does not. */
function readWithAlpha(bitmap) {
  const { width, height } = bitmap;
  const gl = new OffscreenCanvas(1, 1).getContext('webgl2');
  if (!gl || Math.max(width, height) > gl.getParameter(gl.MAX_TEXTURE_SIZE)) {
    throw new PocketError('image: its transparency cannot be read by this browser; save it as a PNG');
  }
  gl.bindTexture(gl.TEXTURE_2D, gl.createTexture());
  gl.pixelStorei(gl.UNPACK_PREMULTIPLY_ALPHA_WEBGL, false);
  gl.pixelStorei(gl.UNPACK_COLORSPACE_CONVERSION_WEBGL, gl.NONE);
  gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGBA, gl.RGBA, gl.UNSIGNED_BYTE, bitmap);
  gl.bindFramebuffer(gl.FRAMEBUFFER, gl.createFramebuffer());
  const texture = gl.getParameter(gl.TEXTURE_BINDING_2D);
  gl.framebufferTexture2D(gl.FRAMEBUFFER, gl.COLOR_ATTACHMENT0, gl.TEXTURE_2D, texture, 0);
  const out = new Uint8Array(width * height * 4);
  gl.readPixels(0, 0, width, height, gl.RGBA, gl.UNSIGNED_BYTE, out);
  gl.getExtension('WEBGL_lose_context')?.loseContext();
  return out;
}
